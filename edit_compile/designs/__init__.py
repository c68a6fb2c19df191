"""Attention designs: what the compiler can rewrite a site's attention to, and the parts they share."""
