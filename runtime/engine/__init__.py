"""The loop: schedule → step → commit → stream."""
