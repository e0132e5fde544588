"""`dicache bench`: how close do caches stay to the un-cached pictures, at equal cost?

`subjects` says what is drawn, `methods` what is compared, `runner` draws and counts, `results` are
plain numbers, `report` and `page` show them.
"""
