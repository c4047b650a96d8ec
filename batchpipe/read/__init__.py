"""Reading the input: files to rows, rows to prompts, prompts to requests. One bad row never ends the reading."""
