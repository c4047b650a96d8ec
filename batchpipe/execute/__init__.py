"""Running steps: one port (`base.Pipeline`), in this process, in a process a stage, or without any model."""
