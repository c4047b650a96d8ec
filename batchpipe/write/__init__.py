"""Writing the output: each input row's outcome reaches the disk once, whenever the process is killed.

`open` locks the folder, compares the job's identity and repairs what a killed run left; `writer` appends outcomes (as
batches of `schema`) to a `row_log` and turns full ones into Parquet parts; `commit` publishes a part and records it;
`folder` knows the paths and which rows are done (`row_set`); `durable` holds the file operations that survive a power
cut, and `crash` the points at which tests kill the process.
"""
