//! Shared harness of the black-box suites.
