"""Checkpoints in LeRobot's layout, as the plugin `lerobot_policy_vla_adapter` writes and reads them."""
