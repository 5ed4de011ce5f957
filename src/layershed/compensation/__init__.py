"""Compensation: closed-form repair of what a drop changes, without training."""
