"""What designs are made of: arithmetic on tokens, convolutions over grids."""
