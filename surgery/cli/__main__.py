"""`python -m surgery.cli`."""

from .app import run

if __name__ == "__main__":
    run()
