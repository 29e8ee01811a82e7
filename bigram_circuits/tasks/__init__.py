"""Behaviours as prompts with answers: the value, the built-in ones, those read from files, and a target made of one."""
