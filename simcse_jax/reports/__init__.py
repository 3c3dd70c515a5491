"""What tables and figures of all reports share."""
