-- Goes on after a pause. Emptied, not removed: Argo CD takes a table that has become empty for unchanged.
obj.metadata.annotations["exchange.dev/pause"] = ""
-- Kubernetes sees Argo CD here, not the person: a signature would be somebody else's.
obj.metadata.annotations["exchange.dev/by"] = nil
return obj
