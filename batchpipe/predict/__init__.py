"""Predicting completion lengths: rows are sorted into classes by their prompts, and a class has a survival curve.

`base` defines the curves and the ports; `quantile` (bins of prompt length) and `classifier` (a trained linear model of
`features`, stored as a `trained_file`) sort rows; `online` corrects a classifier's curves by the job's own completions,
with the estimate of `survival`; `open` builds the predictor that a job asks for. `batchpipe.training` trains one.
"""
