"""Yours: written in the notebooks' `#| export` cells, exported by nbdev, committed."""
