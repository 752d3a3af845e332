"""A small character-level GPT trained with cross-entropy, the barrier alone, or the full MAP objective.

Read in this order: config, loss, train, evaluation, checkpoint, commands.
"""
