"""Engines and model libraries that Keepset works beside, one package or module each."""
