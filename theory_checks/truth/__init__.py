"""Truth for the claims: plain NumPy, quadrature and enumeration, sharing no code with the library."""
