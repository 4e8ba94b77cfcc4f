"""What training and inference cost, by one convention each."""

from clframe.functional.macs import backbone_macs, count_macs, count_parameters, cumulative_macs, stage_macs

__all__ = ["backbone_macs", "count_macs", "count_parameters", "cumulative_macs", "stage_macs"]
