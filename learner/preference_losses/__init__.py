"""What stage preference trains by, a module each with a PREFERENCE_LOSS, which `preference.loss` names. The declarations are
read where configurations are checked, so nothing heavy is imported here."""
