"""Reporting on a run: `meter` sums what the steps and outcomes bring, `metrics` is the table of all runs of a job, and
`progress` shows on stderr how far the run is.
"""
