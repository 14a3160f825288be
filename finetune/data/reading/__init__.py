"""Files in many forms -> rows -> dialogues."""
