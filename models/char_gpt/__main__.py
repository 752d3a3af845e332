"""`python -m models.char_gpt {train,resume,generate,laplace}`."""

from models import cli
from models.char_gpt.commands import main

if __name__ == "__main__":
    cli.run(main)
