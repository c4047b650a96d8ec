"""Measuring this machine with one model: the work behind `batchpipe profile`."""
