"""`python -m edit_compile` is `edit-compile`."""

from edit_compile.cli import main

if __name__ == "__main__":
    main(prog_name="edit-compile")
