"""Reading the input: files to rows, rows to prompts, prompts to requests. One bad row never ends the reading.

`files` finds the input's files and fingerprints them; `formats` holds one reader per format, each of which gives
batches in the terms of `columns`; `source` makes one stream of rows with ids (`duplicates` finds repeated ones).
`content` reads a row's messages, `prompt_template` fills the job's template, `template_inputs` has what else the chat
template is given; `render` writes the prompt with it (`frame` saves running it for each row), and `tokenize` makes
requests of rows. `nested` finds columns named by a path. `ahead` runs all this in a thread beside the engine.
"""
