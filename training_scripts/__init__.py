"""One script a workload; installed as `agr_hf.training_scripts`, for `agr-hf resume` and `agr-hf reproduce`."""
