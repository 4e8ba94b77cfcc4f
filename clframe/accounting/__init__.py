"""What training and inference cost, by one convention each."""

from clframe.accounting.cost import Cost, measure, module_bytes
from clframe.accounting.energy import Energy, EnergyMeter
from clframe.accounting.entries import PHASES, Entry, Phase
from clframe.accounting.ledger import Ledger
from clframe.accounting.prediction_rows import Experts, Part, Products, Stop
from clframe.accounting.predictions import Predictions
from clframe.accounting.timing import DevicePeak, Latency, latency, process_peak_bytes
from clframe.functional.mac_counter import MacCounter
from clframe.functional.macs import backbone_macs, count_macs, count_parameters, cumulative_macs, stage_macs

__all__ = [
    "PHASES",
    "Cost",
    "DevicePeak",
    "Energy",
    "EnergyMeter",
    "Entry",
    "Experts",
    "Latency",
    "Ledger",
    "MacCounter",
    "Part",
    "Phase",
    "Predictions",
    "Products",
    "Stop",
    "backbone_macs",
    "count_macs",
    "count_parameters",
    "cumulative_macs",
    "latency",
    "measure",
    "module_bytes",
    "process_peak_bytes",
    "stage_macs",
]
