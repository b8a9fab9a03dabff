"""The doctor: reads recorded demonstrations and says what would make a policy fail on the robot."""
