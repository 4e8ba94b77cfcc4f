"""What training and inference cost, by one convention each."""

from clframe.functional.macs import count_macs, count_parameters, stage_macs

__all__ = ["count_macs", "count_parameters", "stage_macs"]
