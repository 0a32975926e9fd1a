"""SmolMoE: a real Mixture-of-Experts language model, built from a package, and what it is worth."""
