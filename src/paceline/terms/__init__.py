"""The words everybody speaks: errors, plan, event, bucket, activity. Imports nothing of Paceline and no torch at import time."""
