"""One loop for every fold: training, calibration, search, distillation. Resume, logging and devices live here."""
