"""`python -m edit_compile.cli`."""

from edit_compile.cli import main

if __name__ == "__main__":
    main()
