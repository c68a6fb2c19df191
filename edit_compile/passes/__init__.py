"""The passes: plain functions over graphs. `analysis` runs those over the whole model, `site_compiler` those over each site."""
