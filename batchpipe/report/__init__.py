"""What a run cost and how far it is: metrics in a table, progress on stderr."""

from batchpipe.report.meter import Meter
from batchpipe.report.metrics import RunMetrics, append_metrics, read_metrics
from batchpipe.report.progress import Progress, Reading

__all__ = ["Meter", "Progress", "Reading", "RunMetrics", "append_metrics", "read_metrics"]
