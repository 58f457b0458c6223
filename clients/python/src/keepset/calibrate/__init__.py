"""Calibration: measured losses of a model under candidate tables, as records for `keepset tables compile`."""
