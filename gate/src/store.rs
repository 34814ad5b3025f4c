//! (see the module list below)
