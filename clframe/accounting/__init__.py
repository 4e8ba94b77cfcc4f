"""Cost of training and inference: MACs, time, memory and energy, each by one stated convention."""

from clframe.accounting.entries import PHASES, Entry, Experts, Part, Phase, Products, Stop
from clframe.accounting.ledger import Ledger
from clframe.accounting.mac_counter import MacCounter
from clframe.accounting.macs import (
    Cost,
    backbone_macs,
    count_macs,
    count_parameters,
    cumulative_macs,
    measure_cost,
    module_bytes,
    stage_macs,
)
from clframe.accounting.measurement import DevicePeak, Energy, EnergyMeter, Latency, latency, process_peak_bytes
from clframe.accounting.predictions import Predictions

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
    "measure_cost",
    "module_bytes",
    "process_peak_bytes",
    "stage_macs",
]
