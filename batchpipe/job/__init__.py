"""The job: what the user asked for, checked and frozen."""

from batchpipe.job.load import job_schema, load_job
from batchpipe.job.sampling import Sampling
from batchpipe.job.spec import Job

__all__ = ["Job", "Sampling", "job_schema", "load_job"]
