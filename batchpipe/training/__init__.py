"""Training a predictor of completion lengths on past outputs.

`examples` reads prompts and lengths, `train` fits the classifier and measures its curves, `evaluate` compares a
classifier with completions that it was not trained on.
"""
