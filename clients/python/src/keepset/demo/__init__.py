"""The main job, end to end: `python -m keepset.demo --keepsetd PATH`, which is what `make demo` runs."""
