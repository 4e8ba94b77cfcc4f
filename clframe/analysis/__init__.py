"""What trained models are like inside: measured on any module, and experience by experience on runs."""

from clframe.analysis.activity import Activity, activity, experience_activity, overlap
from clframe.analysis.curves import Curve, Report
from clframe.analysis.sparsity import accuracy, analyse

__all__ = ["Activity", "Curve", "Report", "accuracy", "activity", "analyse", "experience_activity", "overlap"]
