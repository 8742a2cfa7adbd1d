"""Gradient-boosted trees by xgboost: one process, out of core, and several processes together."""
