"""Tiny trained models, their drawn data and real diffusers pipelines around them."""
