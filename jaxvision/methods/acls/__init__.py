"""ACLS: adaptive and conditional label smoothing for network calibration."""
