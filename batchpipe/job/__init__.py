"""The job: what the user asked for, checked and frozen.

`spec` and `sampling` hold every key with its default and check, in the types of `values`; `strict_yaml` reads the file,
`load` makes a job of it (`explain` words the mistakes), and `identity` says which jobs have the same output. `shipped`
finds the configuration files that come with the package.
"""

from batchpipe.job.load import job_schema, load_job
from batchpipe.job.sampling import Sampling
from batchpipe.job.spec import Job

__all__ = ["Job", "Sampling", "job_schema", "load_job"]
