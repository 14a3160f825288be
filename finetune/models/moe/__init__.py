"""Mixtures of experts: GLM-4.5, 4.6 and 4.7 (`glm4_moe`), GLM-4.7-Flash (`glm4_moe_lite`)."""
