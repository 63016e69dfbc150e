"""What policies are trained by, a module each with an OBJECTIVE, which `ppo.objective` names. The declarations are read
where configurations are checked, so torch is imported inside the functions."""
