-- Goes on after a pause. Emptied, not removed: Argo CD takes a table that has become empty for unchanged.
local status = obj.status or {}
-- Argo CD does not ask discovery.lua before it runs this: the menu may be old, or there was none.
local annotations = obj.metadata.annotations or {}
local stack = status.candidate or status.live
local paused = stack ~= nil and annotations["exchange.dev/pause"] == stack.revision .. "." .. stack.attempt
if not paused or status.stoppedSince == nil then
  error("it is not paused")
end
annotations["exchange.dev/pause"] = ""
-- Kubernetes sees Argo CD here, not the person: a signature would be somebody else's.
obj.metadata.annotations["exchange.dev/by"] = nil
return obj
