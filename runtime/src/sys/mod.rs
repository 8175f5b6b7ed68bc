//! Kernel facilities without a safe wrapper elsewhere: one file for each. The only place with `unsafe`.
