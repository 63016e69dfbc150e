"""Advantage and likelihood estimators, a module each with an ESTIMATOR, which `ppo.estimator` names. The declarations are
read where configurations are checked, so torch is imported inside the functions."""
