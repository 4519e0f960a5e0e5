"""Training: the plan with its schedules, global updates and guard."""

from scvi_sams.train._trainingplan import SAMSTrainingPlan

__all__ = ["SAMSTrainingPlan"]
