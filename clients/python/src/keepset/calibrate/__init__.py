"""Calibration: measured losses of a model under candidate tables, as records for `keepset tables compile`."""


class CalibrationError(ValueError):
    """What a person can put right: other settings in the same place, a program that is not built."""
